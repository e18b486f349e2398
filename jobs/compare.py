"""The command `unet-compare`, for use from a checkout; see unet/commands/compare.py."""

from unet.commands.compare import main

if __name__ == "__main__":
    main()
