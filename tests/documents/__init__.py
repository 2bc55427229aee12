"""The commands and snippets of README.md and docs/ run, and their output is what the page shows.

    python -m tests.documents docs/data.md            check pages; default: all
    python -m tests.documents --write docs/data.md    write the real output where it differs
    python -m tests.documents --write --model models/smollm2-135m-instruct docs/data.md
                                                      write all output anew, with the figures of a real model

The blocks of a page run from the top to the bottom, in one fresh folder (see below):

- ```console: a line that begins with `$ ` is a command; a `\\` at its end continues it. The lines below it are
  its output as a terminal shows it, without the bars of progress. Numbers, sizes, times, ids and white space
  are not compared. A line `...` replaces any number of lines. Without output, the command only has to succeed.
  To have the output written by `--write`, write any line below the command.
- ```sh: commands only.
- ```python: code; all of a page share their names. A ```text block that follows at once is what it prints.
- A command has to exit with 0, unless `# exit code 1` follows it, or its output has a line `error: `.
- Other blocks (```text, ```json, ...) do not run, and hold no commands. Every block names its language.

Comments are instructions to the test, which readers do not see:

- `<!-- starts with: cache, run -->`: the folder also holds what `READY` in folder.py makes.
- `<!-- not run: needs a GPU -->` before a block: its commands are only parsed, its code is only compiled. The
  reasons are `REASONS` in blocks.py.
- Blocks inside a comment run like others: a page prepares with them what it does not show.

    <!--
    ```sh
    mkdir scratch
    ```
    -->

The folder of a page holds:

    model/                                     a tiny random model, with a tokenizer and a chat template
    models/smollm2-135m-instruct/              the same
    HuggingFaceTB/SmolLM2-135M-Instruct/       the same, so that commands with this Hub id run
    examples/                                  of the repository; examples/data has fewer rows
    pairs.jsonl, heldout.jsonl                 copies of examples/data/train.jsonl and heldout.jsonl

Pages show the folder as /home/me/prefs. S3 is a server on this machine, with the empty bucket `s3://bucket`, if
the page starts with `bucket`.
"""
