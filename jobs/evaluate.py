"""The command `unet-evaluate`, for use from a checkout; see unet/commands/evaluate.py."""

from unet.commands.evaluate import main

if __name__ == "__main__":
    main()
