"""The command line `ssl-vit runs`."""

from ssl_vit.commands import main, runs

if __name__ == "__main__":
    main(runs)
