"""The notebooks in examples/ run.

    python -m tests.example_notebooks                                     run all, with a tiny random model
    python -m tests.example_notebooks examples/quickstart.ipynb           run some of them
    python -m tests.example_notebooks --write --model FOLDER              run all with a real model, and store the outputs

They run one after another in one fresh copy of examples/, in which the Hub id of the example model is a folder.
Each cell has to succeed, to write nothing to stderr, and to give outputs of the kinds that the notebook shows.
"""
