"""What to do about a table that is in none of the forms of preferences, by the columns that it has."""

from src.data.columns import ABOUT, ANSWERS, CONVERSATIONS, HISTORIES, PROMPTS, REJECT, Table
from src.data.lists import ANSWER_LISTS

_FORMS = ("preferences are pairs (prompt,chosen,rejected), answers with a thumb (prompt,completion,label) or lists of answers "
          "(prompt,responses,scores)")
# Of one answer: OpenRLHF's, HelpSteer's.
_SCORES = ("labels", "score", "rating", "reward", "overall_score", "helpfulness", "correctness", "quality")
_AS_THEY_ARE = "train.py --sft 1 learns from them as they are"
# Names of which a form has one each, and what to do; the first form that fits counts.
_NEAR = (
    ((ANSWER_LISTS, ("labels",)), "{1} of the steps of an answer (TRL's stepwise supervision) are not read: give whole answers, "
                                  "each in a row of its own with a thumb"),
    ((ANSWER_LISTS,), "give the entries of {0} their scores, in a list scores, or their ranks, in a list ranks"),
    ((ANSWERS, _SCORES), "name {1} label if it is 1 or 0, for good and bad answers; else put all answers to a prompt into one "
                         "row, as a list responses, and their numbers as a list scores"),
    ((REJECT,), "name the column of the good answers chosen"),
    ((ANSWERS,), f"name {{0}} chosen if all are good, and rlhf_generate_reject_csv.py writes rejected answers; {_AS_THEY_ARE}"),
    ((CONVERSATIONS,), f"add thumbs as a column label, or other last answers as a column rejected_response; {_AS_THEY_ARE}"),
    (((*PROMPTS, *ABOUT, *HISTORIES),), "{0} alone is not enough: add a column chosen with good answers"),
)


def advice(table: Table) -> str:
    """What to do in words, beginning with the form that the table comes near to, if there is one."""
    names = {name.lower(): " ".join(name.split())[:40] for name in table.names}
    for groups, words in _NEAR:
        found = [next((names[name] for name in group if name in names), None) for group in groups]
        if all(found):
            return f"{words.format(*found)}; {_FORMS}"
    return _FORMS
