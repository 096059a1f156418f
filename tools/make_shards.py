"""The command line `ssl-vit make_shards`."""

from ssl_vit.commands import main, make_shards

if __name__ == "__main__":
    main(make_shards)
