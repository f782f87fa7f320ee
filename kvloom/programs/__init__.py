"""What is fed to the model: partial prefill over stored chunks, edits, parallel contexts. One file per published system.

Read it as chunk (keys and values of a run of tokens), place (a chunk into a cache), feed (one forward over some rows of the
text), then the systems.
"""

from kvloom.programs.chunk import Chunk, compute, context_of, load, save, take
from kvloom.programs.partial import Fed, Step, feed
from kvloom.programs.place import place

__all__ = ["Chunk", "Fed", "Step", "compute", "context_of", "feed", "load", "place", "save", "take"]
