"""The command line `ssl-vit analyze`."""

from ssl_vit.commands import analyze, main

if __name__ == "__main__":
    main(analyze)
