"""`python -m prune_cli`, also under torchrun."""

from prune_cli.cli import main

if __name__ == "__main__":
    main()
