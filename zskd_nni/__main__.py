"""``python -m zskd_nni`` is ``zskd-nni``."""

from zskd_nni.cli import main

if __name__ == "__main__":
    main()
