from dpo_cache.errors import shown_rows


def test_rows_are_shown_with_their_first_few() -> None:
    assert shown_rows([3]) == "3"
    assert shown_rows(list(range(8))) == "0, 1, 2, 3, 4, 5, 6, 7"
    assert shown_rows(list(range(9))) == "0, 1, 2, 3, 4, 5, 6, 7, …"
    assert shown_rows([1, 2, 4], most=2) == "1, 2, …"
    assert shown_rows([1, 2], count=2) == "1, 2" and shown_rows([1, 2], count=3) == "1, 2, …"
