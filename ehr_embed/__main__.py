"""`python -m ehr_embed COMMAND ...` is `ehr-embed COMMAND ...`, for an environment whose scripts are not on the path."""

from ehr_embed.console.main import main

if __name__ == "__main__":
    main()
