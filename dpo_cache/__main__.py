"""`python -m dpo_cache`."""

from dpo_cache.cli.app import main

main()
