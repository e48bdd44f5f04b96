"""`python -m finetune`: the command `finetune-unet` for `accelerate launch -m` and `torchrun -m`."""

import sys

from finetune.cli import main

if __name__ == "__main__":  # processes that prepare pictures may import this module again
    sys.exit(main())
