"""Compile the native engine ahead of its first use, as `make install` does."""

from skiprnn.model.engines.native import build

if __name__ == "__main__":
    if build.available():
        print(f"native engine: ready, {build.best_variant()}")
