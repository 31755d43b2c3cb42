"""`python -m torchopt` is the command line."""

from torchopt.cli.commands import main

if __name__ == "__main__":
    main()
