"""`python -m vision_attn.apps`, the same as `vision-attn`."""

import sys

from vision_attn.apps.cli import main

sys.exit(main())
