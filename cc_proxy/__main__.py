"""`python -m cc_proxy` is `cc-proxy`."""

import sys

from cc_proxy.cli.daemon import main

sys.exit(main())
