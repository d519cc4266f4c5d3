"""Heavy work as jobs: a folder each, done by one worker process a device, followed from the disk.

No file here knows the web page; only `work.py` imports torch, and only inside the worker.
"""
