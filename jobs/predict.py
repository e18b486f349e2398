"""The command `unet-predict`, for use from a checkout; see unet/commands/predict.py."""

from unet.commands.predict import main

if __name__ == "__main__":
    main()
