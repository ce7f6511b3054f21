"""Somebody else's model: an adapter in front of Magika, a frozen classifier of file types in ONNX Runtime.

    python -m examples.somebody_elses_model

Magika (Google; its model of 3 MB is in the package ``magika``) tells 214 types of files by their bytes. Here it gets
listings: files with what a tool has put before each line, as ``git blame``, a log, a mail and ``cat -n`` do. The files
are those of one's own Python environment. The runtime's answers are all that training sees of the model.
"""

from examples.runs import main
from examples.somebody_elses_model.experiment import train

main("somebody_elses_model", __doc__, train, ("files alone", "map behind", "adapter in front"), "adapter")
