"""`python -m convlora`: the command `convlora`."""

from convlora.cli.app import main

if __name__ == "__main__":
    main()
