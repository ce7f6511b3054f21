"""What is done to runs here: they are killed, their files damaged, their disks filled, their numbers made NaN.

The ordinary suite has the short form of each; ``make faults`` the long one.
"""

import os

LONG = os.environ.get("FAULTS") == "long"
