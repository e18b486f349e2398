"""The command `unet-train`, for use from a checkout; see unet/commands/train.py."""

from unet.commands.train import main

if __name__ == "__main__":
    main()
