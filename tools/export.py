"""The command line `ssl-vit export`."""

from ssl_vit.commands import export, main

if __name__ == "__main__":
    main(export)
