"""The command `unet-doctor`, for use from a checkout; see unet/commands/doctor.py."""

from unet.commands.doctor import main

if __name__ == "__main__":
    main()
