"""The command line `ssl-vit predict`."""

from ssl_vit.commands import main, predict

if __name__ == "__main__":
    main(predict)
