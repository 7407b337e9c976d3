"""Which release this is. Told here and not by the installed distribution: the image has the code without one."""

VERSION = "0.1.0"
