"""Micro-batches and who gets them: nothing depends on the number of ranks, and every rank does the same amount."""

import pytest

from fastvideo_grpo.grpo.dealing import Dealing

CASES = [
    Dealing(4, 4, 4, 2, 2, 1),
    Dealing(4, 4, 4, 2, 2, 2),
    Dealing(4, 4, 4, 2, 2, 4),
    Dealing(2, 8, 4, 2, 2, 2),
    Dealing(32, 12, 12, 1, 4, 32),
]


@pytest.mark.parametrize("case", CASES)
def test_every_sample_is_drawn_once_and_every_rank_draws_as_many(case):
    case.check()
    shares = [case.rollout_batches(rank) for rank in range(case.ranks)]
    drawn = [(group, member) for share in shares for group, members in share for member in members]
    assert sorted(drawn) == [(g, m) for g in range(case.prompts) for m in range(case.group_size)]
    assert len({len(share) for share in shares}) == 1
    assert case.owners() == {(g, m): rank for rank, share in enumerate(shares) for g, members in share for m in members}


@pytest.mark.parametrize("case", CASES)
def test_updates_are_whole_groups_whatever_the_number_of_ranks(case):
    for update in range(case.updates):
        shares = [case.update_batches(update, rank) for rank in range(case.ranks)]
        assert len({len(share) for share in shares}) == 1
        assert {group for share in shares for group, _ in share} == set(case.groups_of(update))
    assert [g for u in range(case.updates) for g in case.groups_of(u)] == list(range(case.prompts))


@pytest.mark.parametrize("case", CASES[:3])
def test_without_best_of_a_sample_is_trained_where_it_was_drawn(case):
    owners = case.owners()
    for rank in range(case.ranks):
        for update in range(case.updates):
            for group, k in case.update_batches(update, rank):
                first = k * case.micro_batch_size
                assert all(owners[group, first + row] == rank for row in range(case.micro_batch_size))


@pytest.mark.parametrize(
    "case,message",
    [
        (Dealing(4, 6, 6, 4, 1, 1), "group_size.*engine.micro_batch_size=3 or 6"),
        (Dealing(5, 4, 4, 4, 2, 1), "prompts_per_iteration=4 or 6.*updates_per_iteration=1 or 5"),
        (Dealing(4, 4, 4, 4, 1, 3), "cannot be dealt evenly to 3 processes.*prompts_per_iteration=3 or 6"),
        (Dealing(4, 8, 2, 2, 2, 4), "the update of one update is 2 prompts x 1 micro-batches"),
    ],
)
def test_what_cannot_be_dealt_is_refused_with_values_that_can(case, message):
    with pytest.raises(ValueError, match=message):
        case.check()
