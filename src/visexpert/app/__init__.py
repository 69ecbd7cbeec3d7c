"""The page of ``visexpert serve``: drop an image, ask, and see which expert each patch listens to (extra ``app``)."""
