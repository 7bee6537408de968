"""What an error says to who calls Python, and to who types a command."""

from perfusion.errors import advise, for_command_line


def test_each_reader_gets_advice_of_their_own():
    error = advise(ValueError("no name."), python="Give name=.", command="Give --name.")
    assert type(error) is ValueError
    assert (str(error), for_command_line(error)) == ("no name. Give name=.", "no name. Give --name.")


def test_an_error_without_advice_says_the_same_to_both():
    assert for_command_line(ValueError("no name.")) == "no name."
