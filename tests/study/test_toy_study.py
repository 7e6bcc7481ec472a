"Rung b: rows in processes of their own are those of one process, and a study that was stopped goes on."
import json
from concurrent.futures import ThreadPoolExecutor

import g2rpo.study.toy_study as study
from g2rpo.study.toy import ToyConfig

def test_rows_in_processes_are_those_of_one(tmp_path, monkeypatch):
    file = tmp_path/'toy.json'
    monkeypatch.setattr(study, 'LADDER_CLAIMS', [study.Claim('TMPO > TreeGRPO', 'tmpo', 'tree_grpo')])
    monkeypatch.setattr(study, 'TOY_NAMES', ('tree_grpo',))
    study.toy_study(file, 2, 300)
    monkeypatch.setattr(study, 'TOY_NAMES', ('tree_grpo', 'tmpo'))
    stored, records, (held, trained) = study.toy_study(file, 2, 300)
    assert list(stored['rows']) == ['tree_grpo', 'tmpo'] == list(records.rows) and held['seeds'] == 2
    alone = study._study_rows(['tmpo'], ToyConfig(300, replicas=2))
    assert stored['rows']['tmpo'] == alone['rows']['tmpo'] and stored['rates']['tmpo'] == alone['rates']['tmpo']
    assert json.loads(file.read_text()) == stored

def test_every_row_is_trained_with_the_search_that_decides_its_rate(tmp_path, monkeypatch):
    "Also one that takes its rate from rows beside it."
    asked = []
    def trained(names, toy):
        asked.append(names)
        by_row = {key: dict.fromkeys(names, 0) for key in ('codes', 'rates', 'spent', 'rows')}
        return by_row | dict(base={}, seconds=1)
    monkeypatch.setattr(study, '_study_rows', trained)
    monkeypatch.setattr(study, 'ProcessPoolExecutor', lambda mp_context: ThreadPoolExecutor())
    monkeypatch.setattr(study, 'read_kept', lambda stored: None)
    monkeypatch.setattr(study, 'judge_claims', lambda *args: [])
    stored, _, _ = study.toy_study(tmp_path/'toy.json', 2, 300)
    assert set(stored['rows']) == set(study.TOY_NAMES) and sum(map(len, asked)) == len(study.TOY_NAMES)
    assert ['g2rpo_no_mgai', 'g2rpo', 'e_grpo'] in asked
