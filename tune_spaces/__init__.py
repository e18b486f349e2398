"""Search spaces, one readable file each; add one by adding a file."""
