"""The command `unet-prepare`, for use from a checkout; see unet/commands/prepare.py."""

from unet.commands.prepare import main

if __name__ == "__main__":
    main()
