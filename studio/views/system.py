from .page import Page


def build(page: Page) -> None:
    pass
