"""`c2i bench`: the method and its peers on the same rows, in one run."""
