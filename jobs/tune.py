"""The command `unet-tune`, for use from a checkout; see unet/commands/tune.py."""

from unet.commands.tune import main

if __name__ == "__main__":
    main()
