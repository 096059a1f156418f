"""`python -m ssl_vit NAME key=value ...`: the same as `ssl-vit NAME ...`."""

from ssl_vit.commands import cli

if __name__ == "__main__":
    cli()
