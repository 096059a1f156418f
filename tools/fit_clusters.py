"""The command line `ssl-vit fit_clusters`."""

from ssl_vit.commands import fit_clusters, main

if __name__ == "__main__":
    main(fit_clusters)
