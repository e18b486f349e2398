"""The command `unet-export`, for use from a checkout; see unet/commands/export.py."""

from unet.commands.export import main

if __name__ == "__main__":
    main()
