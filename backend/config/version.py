"""Name and version of the program, as they go into files, journals and the page."""

VERSION = "0.1.0"
PROGRAM = f"K5 Studio {VERSION}"
