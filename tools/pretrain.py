"""The command line `ssl-vit pretrain`."""

from ssl_vit.commands import main, pretrain

if __name__ == "__main__":
    main(pretrain)
