"""The command line `ssl-vit finetune`."""

from ssl_vit.commands import finetune, main

if __name__ == "__main__":
    main(finetune)
