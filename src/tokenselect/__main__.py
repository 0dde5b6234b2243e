"""`python -m tokenselect`."""

from tokenselect.cli import main

if __name__ == "__main__":  # vLLM's processes import it under another name
    main()
