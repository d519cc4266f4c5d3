"""Training runs, whatever is trained: a directory, a loop that tells what happens, and an exact way back into it.

    config.py         the settings that every run has
    run.py            from a config to files: check, prepare, loop; Ctrl-C saves
    session.py        the loop: step, look, save, until the end or until asked to stop
    trainer.py        one optimizer step
    directory.py      what a run leaves on disk, and how it is taken up again
    events.py         what a run tells; followers.py: progress bar, files, TensorBoard
    random_state.py   every draw by counting, so that there is no random state to save

A front end brings three things: a config (`RunConfig`), what is to be minimised (`Task`), and a `Session` that says
what to show meanwhile and what the finished adapter looks like.
"""
