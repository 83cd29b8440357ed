"""The files in deploy/, checked as far as possible without a container engine, a cluster and a network."""

import asyncio
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from command_lines import require_parses
from compose_spec import PyOptions

from peer.errors import RevokedInviteError
from peer.loop import LoopThread
from talkoot.node.control import ControlServer

DEPLOY = Path(__file__).parents[1] / "deploy"
CONTAINERFILE = DEPLOY / "container" / "Containerfile"
COMPOSE = DEPLOY / "compose.yaml"
UNIT = DEPLOY / "systemd" / "talkoot-node.service"
NODES = DEPLOY / "kubernetes" / "nodes.yaml"


def compose() -> str:
    """The file, with its variables replaced by their defaults, or by an address where they have none."""
    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", COMPOSE.read_text())
    return re.sub(r"\$\{\w+:\?[^}]*\}", "192.0.2.7", text)


def own_services() -> dict[str, dict[str, Any]]:
    services: dict[str, dict[str, Any]] = yaml.safe_load(compose())["services"]
    return {name: service for name, service in services.items() if "talkoot" in service["image"]}


# The container


def test_containerfile_has_no_lint() -> None:
    ended = subprocess.run(
        [str(Path(sys.executable).with_name("hadolint")), str(CONTAINERFILE)], capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_container_runs_without_root_and_with_all_packages() -> None:
    text = CONTAINERFILE.read_text()
    last_stage = text.rpartition("\nFROM ")[2]
    assert "\nUSER 10001:10001\n" in last_stage
    assert "HEALTHCHECK" in last_stage
    assert "pip install" not in last_stage
    copied = set(re.findall(r"^COPY (\w+) \w+$", text, re.MULTILINE))
    assert copied == {"peer", "dht", "expert_server", "trainer_client", "talkoot"}


def health(state: Path) -> int:
    return subprocess.run(
        [sys.executable, str(DEPLOY / "container" / "health.py")],
        env=os.environ | {"TALKOOT_NODE_STATE": str(state)},
        capture_output=True,
        timeout=60,
    ).returncode


def test_container_is_healthy_while_its_node_answers(loop: LoopThread, tmp_path: Path) -> None:
    assert health(tmp_path) != 0

    async def ask() -> int:
        async with ControlServer(tmp_path):
            return await asyncio.to_thread(health, tmp_path)

    assert loop.run(ask(), 120) == 0
    assert health(tmp_path) != 0


# Compose


def test_compose_file_is_valid() -> None:
    read = PyOptions(apply_merge=True).from_yaml(compose())
    read.validate()
    assert {"bootstrap", "node", "trainer", "dashboard", "prometheus", "grafana"} == set(read.service_names())


def test_compose_file_starts_commands_that_exist() -> None:
    commands = {service["command"][0]: service["command"] for service in own_services().values()}
    for name in ("node", "train", "dashboard"):
        require_parses(commands[name])
    assert set(commands) == {"node", "train", "dashboard"}


def test_compose_services_have_no_more_rights_than_they_need() -> None:
    for name, service in own_services().items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert "no-new-privileges:true" in service["security_opt"], name
        assert f"{name}:/state" in service["volumes"]


def test_compose_service_is_given_time_to_hand_over() -> None:
    assert all(int(service["stop_grace_period"].rstrip("s")) > 30 for service in own_services().values())


def test_prometheus_scrapes_every_service_of_the_compose_file() -> None:
    """Metrics are not published: services that use the machine's network are scraped over its loopback interface."""
    read = yaml.safe_load(compose())
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    files = [
        file
        for job in config["scrape_configs"]
        for sd in job.get("file_sd_configs", ())
        for file in sd["files"]
    ]
    (mounted,) = read["services"]["prometheus"]["configs"]
    assert Path(mounted["target"]).match(os.path.normpath(Path("/etc/prometheus") / files[0]))
    listed = yaml.safe_load(read["configs"][mounted["source"]]["content"])
    roles = {target: group["labels"]["role"] for group in listed for target in group["targets"]}
    swarm = tomllib.loads((DEPLOY / "swarm.toml").read_text())["name"]
    assert {group["labels"]["swarm"] for group in listed} == {swarm}
    served = {}
    for service in own_services().values():
        command, *options = service["command"]
        if command != "dashboard":  # which has a job of its own
            assert service["network_mode"] == "host"
            (port,) = (o.removeprefix("--metrics-port=") for o in options if o.startswith("--metrics-port="))
            served[f"127.0.0.1:{port}"] = {"node": "node", "train": "trainer"}[command]
    assert served == roles


# Prometheus

LASTING = {
    "TalkootSwarmUnreachable": {"talkoot_swarm_reachable": "0x80"},
    "TalkootDashboardDown": {'up{job="talkoot-dashboard"}': "0x80"},
    "TalkootExpertsWithoutHost": {"talkoot_swarm_experts": "8x80", "talkoot_swarm_live_experts": "5x80"},
    "TalkootMemoryShardsBelowTwo": {"talkoot_swarm_memory_shards_below_two": "3x80"},
    "TalkootCallsFail": {
        'talkoot_trainer_calls_total{swarm="sauna"}': "0+100x80",
        'talkoot_trainer_failures_total{swarm="sauna", cause="unavailable"}': "0+9x80",
        'talkoot_trainer_failures_total{swarm="sauna", cause="internal"}': "0+9x80",
    },
    "TalkootTrainerStandsStill": {'talkoot_trainer_steps_total{instance="kuusi:1"}': "0x80"},
    "TalkootExpertsRollBack": {'talkoot_rollbacks_total{swarm="sauna"}': "0+1x80"},
    "TalkootCheckpointsFail": {'talkoot_checkpoint_failures_total{instance="kuusi:1"}': "0x70 1x10"},
    "TalkootDaemonRestarts": {'talkoot_p2pd_restarts_total{instance="kuusi:1"}': "0+0.2x80"},
    "TalkootParserFails": {'talkoot_parse_failures_total{instance="kuusi:1", message="call"}': "0x70 1x10"},
    "TalkootTasksFail": {'talkoot_task_restarts_total{instance="kuusi:1"}': "0+0.2x80"},
    "TalkootDescriptorsRunOut": {
        'process_open_fds{job="talkoot", instance="kuusi:1"}': "900x80",
        'process_max_fds{job="talkoot", instance="kuusi:1"}': "1024x80",
    },
    "TalkootLoopHeld": {'talkoot_loop_longest_lag_seconds{job="talkoot", instance="kuusi:1"}': "3x80"},
}
"""For each alert, what Prometheus reads every half minute, for 40 minutes, while the alert's reason lasts."""

HEALTHY = {
    "talkoot_swarm_reachable": "1x80",
    'up{job="talkoot-dashboard"}': "1x80",
    "talkoot_swarm_experts": "8x80",
    "talkoot_swarm_live_experts": "8x80",
    "talkoot_swarm_memory_shards_below_two": "0x80",
    'talkoot_trainer_calls_total{swarm="sauna"}': "0+100x80",
    'talkoot_trainer_failures_total{swarm="sauna", cause="unavailable"}': "0+5x80",
    'talkoot_trainer_steps_total{instance="kuusi:1"}': "0+3x80",
    # a loop in somebody's own program that reports its first step late
    'talkoot_trainer_steps_total{instance="kuusi:2"}': "_x70 1+3x10",
    'talkoot_rollbacks_total{swarm="sauna"}': "0x70 1x10",
    'talkoot_checkpoint_failures_total{instance="kuusi:1"}': "0x80",
    'talkoot_p2pd_restarts_total{instance="kuusi:1"}': "0x70 1x10",
    'talkoot_parse_failures_total{instance="kuusi:1", message="call"}': "0x80",
    'talkoot_task_restarts_total{instance="kuusi:1"}': "0x70 1x10",
    'process_open_fds{job="talkoot", instance="kuusi:1"}': "90x80",
    'process_max_fds{job="talkoot", instance="kuusi:1"}': "1024x80",
    'talkoot_loop_longest_lag_seconds{job="talkoot", instance="kuusi:1"}': "0.1x70 5x5 0.1x5",
}


def alerts() -> dict[str, dict[str, Any]]:
    groups = yaml.safe_load((DEPLOY / "prometheus" / "rules.yml").read_text())["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"] if "alert" in rule}


def scenario(series: dict[str, str], fires: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """A test for `promtool`: which alerts fire after 40 minutes."""
    return {
        "interval": "30s",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "alert_rule_test": [
            {"eval_time": "40m", "alertname": name, "exp_alerts": fires.get(name, [])} for name in alerts()
        ],
    }


def expected(name: str, rule: dict[str, Any]) -> dict[str, Any]:
    """The alert as Prometheus should show it: the labels of its first series that its expression keeps."""
    labels = dict(re.findall(r'(\w+)="([^"]*)"', next(iter(LASTING[name]))))
    known = {"labels.instance": labels.get("instance", ""), "value": "3"}
    words = {
        key: re.sub(r"{{ \$(\S+) }}", lambda variable: known[variable[1]], text)
        for key, text in rule["annotations"].items()
    }
    return {"exp_labels": labels | rule["labels"], "exp_annotations": words}


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool, as Debian's prometheus has it")
def test_each_alert_fires_for_its_reason_and_none_in_a_healthy_swarm(tmp_path: Path) -> None:
    rules = alerts()
    assert list(rules) == list(LASTING)
    tests = [scenario(series, {name: [expected(name, rules[name])]}) for name, series in LASTING.items()]
    file = tmp_path / "tests.yml"
    file.write_text(
        yaml.safe_dump(
            {
                "rule_files": [str(DEPLOY / "prometheus" / "rules.yml")],
                "evaluation_interval": "30s",
                "tests": [*tests, scenario(HEALTHY, {})],
            }
        )
    )
    ended = subprocess.run(
        ["promtool", "test", "rules", str(file)], capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_each_alert_says_what_to_do() -> None:
    assert all(rule["annotations"].keys() == {"summary", "description"} for rule in alerts().values())


# systemd


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The unit file, with a program that exists."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze here")
    path = tmp_path / UNIT.name
    path.write_text(UNIT.read_text().replace("/opt/talkoot/bin/talkoot", sys.executable))
    return path


def test_systemd_finds_nothing_wrong_with_the_unit(unit: Path) -> None:
    ended = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True)
    assert (ended.returncode, unit.name in ended.stderr) == (0, False), ended.stderr


def test_unit_is_exposed_little(unit: Path) -> None:
    """systemd's own score, from 0 to 10. A node needs the network and GPUs."""
    analyze = ["systemd-analyze", "security", "--offline=true", "--threshold=20", str(unit)]
    ended = subprocess.run(analyze, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_unit_does_not_start_a_revoked_node_again() -> None:
    assert f"RestartPreventExitStatus={RevokedInviteError.exit_status}" in UNIT.read_text().splitlines()


def test_unit_starts_a_command_that_exists() -> None:
    (line,) = (line for line in UNIT.read_text().splitlines() if line.startswith("ExecStart="))
    program, *words = line.removeprefix("ExecStart=").split()
    assert program == "/opt/talkoot/bin/talkoot"
    require_parses(words)


# Kubernetes


def resources() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(NODES.read_text()))


@pytest.mark.parametrize("version", ["1.30", "1.37"])
def test_kubernetes_resources_fit_the_schema(version: str) -> None:
    for resource in resources():
        kubernetes_validate.validate(resource, version, strict=True)


def test_kubernetes_nodes_keep_their_state_and_have_few_rights() -> None:
    (nodes,) = (resource for resource in resources() if resource["kind"] == "StatefulSet")
    pod = nodes["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    require_parses(container["args"])
    (claim,) = nodes["spec"]["volumeClaimTemplates"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts[claim["metadata"]["name"]] == "/state"
    assert pod["securityContext"]["runAsNonRoot"]
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert pod["terminationGracePeriodSeconds"] > 30
