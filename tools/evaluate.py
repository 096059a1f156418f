"""The command line `ssl-vit evaluate`."""

from ssl_vit.commands import evaluate, main

if __name__ == "__main__":
    main(evaluate)
