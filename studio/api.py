from .views.page import Page


def add(page: Page) -> None:
    pass
