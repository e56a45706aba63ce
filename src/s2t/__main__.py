"""`python -m s2t` is the same as `s2t`."""

from __future__ import annotations

import sys

from s2t.cli.main import main

sys.exit(main())
