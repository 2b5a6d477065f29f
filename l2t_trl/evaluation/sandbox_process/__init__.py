"""The processes that programs run in. Started as a folder, with nothing but the standard library (see `__main__`)."""
