"""The command line `ssl-vit index_shards`."""

from ssl_vit.commands import index_shards, main

if __name__ == "__main__":
    main(index_shards)
