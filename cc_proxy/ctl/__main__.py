"""`python -m cc_proxy.ctl` is cc-proxyctl."""

import sys

from cc_proxy.cli.ctl import main

if __name__ == "__main__":
    sys.exit(main())
