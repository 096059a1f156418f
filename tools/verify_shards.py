"""The command line `ssl-vit verify_shards`."""

from ssl_vit.commands import main, verify_shards

if __name__ == "__main__":
    main(verify_shards)
