"""TRL's own tests of its `DPOTrainer`, run with TRL's trainer and with `CachedDPOTrainer`: `make test-trl`.

The tests are read from a checkout of TRL, which is not a part of this repository:

    git clone https://github.com/huggingface/trl /tmp/trl
    make test-trl TRL_SOURCE=/tmp/trl

`prepare.py` makes tiny models, tokenizers and data sets in place of those that the tests take from the Hub;
`plugin/` puts `CachedDPOTrainer` in place of `DPOTrainer`, and fills its cache; `compare.py` runs both.
"""
