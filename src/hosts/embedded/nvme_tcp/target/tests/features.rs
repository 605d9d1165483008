//! Discovery, controllers and what happens to their connections.

use super::*;
use crate::hosts::embedded::nvme_tcp::command::{
    CONTROLLER_ID_DYNAMIC, DISCOVERY_NQN, admin_opcode, cns, feature, log_page,
};
use crate::hosts::embedded::nvme_tcp::identify::{IDENTIFY_BYTES, IdentifyController};
use crate::hosts::embedded::nvme_tcp::initiator::InitiatorError;

#[test]
fn a_host_learns_what_the_subsystem_has() {
    let mut lab = Lab::new(TargetOptions::default());
    let host = lab.connect(false, false);
    let info = host.controller.info();
    assert_eq!(info.identify.subsystem_nqn, NQN);
    assert_eq!(info.identify.version, 0x10400);
    assert_eq!(info.max_transfer_bytes, Some(131_072));
    assert_eq!(info.in_capsule_bytes, 4096);
    assert_eq!(info.io_queues, 1);
    assert_eq!(info.io_entries, 128);
    assert_eq!(info.namespaces.len(), 2);
    let disk = info.namespaces[0];
    assert_eq!(
        (disk.nsid, disk.block_size, disk.size_blocks),
        (1, 512, BLOCKS)
    );
    assert_eq!((disk.nguid, disk.uuid), ([3; 16], [4; 16]));
    assert!(disk.write_zeroes_deallocates);
    assert!(!info.namespaces[1].write_zeroes_deallocates, "an endpoint");
}

#[test]
fn the_discovery_log_lists_every_subsystem_at_every_listener() {
    let mut lab = Lab::new(TargetOptions::default());
    let mut state = lab.target.lock().unwrap();
    for index in 0..5 {
        let mut parameters = SubsystemParameters::new(&format!("nqn.2016-06.io.spdk:more{index}"));
        parameters.allow_any_host = true;
        let nqn = parameters.nqn.clone();
        state.create_subsystem(parameters).unwrap();
        state
            .add_listener(&nqn, ListenerAddress::tcp("127.0.0.2", "4421"))
            .unwrap();
    }
    state
        .add_listener(NQN, ListenerAddress::tcp("::1", "4422"))
        .unwrap();
    let closed = SubsystemParameters::new("nqn.2016-06.io.spdk:not-for-you");
    state.create_subsystem(closed.clone()).unwrap();
    state.add_listener(&closed.nqn, here()).unwrap();
    drop(state);
    let parameters = ControllerParameters {
        subsystem_nqn: DISCOVERY_NQN.into(),
        ..parameters()
    };
    let controller = lab.controller(parameters);
    let found = &controller.info().discovery;
    assert_eq!(found.len(), 7);
    let here = found.iter().filter(|entry| entry.subsystem_nqn == NQN);
    let places: Vec<_> = here
        .map(|entry| {
            (
                entry.address.as_str(),
                entry.service.as_str(),
                entry.address_family,
            )
        })
        .collect();
    assert_eq!(places, [("127.0.0.1", "4420", 1), ("::1", "4422", 2)]);
    assert!(
        found
            .iter()
            .all(|entry| entry.transport_type == 3 && entry.subsystem_type == 2)
    );
}

fn refusal(lab: &mut Lab, change: impl Fn(&mut QueueParameters)) -> (NvmeStatus, u32) {
    let mut parameters = QueueParameters {
        queue_id: 0,
        entries: 32,
        controller_id: CONTROLLER_ID_DYNAMIC,
        subsystem_nqn: NQN.into(),
        host_nqn: HOST.into(),
        host_id: [1; 16],
        keep_alive_ms: 0,
        header_digest: false,
        data_digest: false,
        in_capsule_bytes: 8192,
    };
    change(&mut parameters);
    let (_, queue) = lab.queue(parameters);
    match queue.error() {
        Some(InitiatorError::Refused { status, result, .. }) => (*status, *result),
        other => panic!("not refused: {other:?}"),
    }
}

#[test]
fn a_wrong_connect_is_refused_with_the_place_of_the_mistake() {
    let mut lab = Lab::new(TargetOptions::default());
    let invalid = NvmeStatus::CONNECT_INVALID_PARAMETERS;
    let unknown = refusal(&mut lab, |connect| {
        connect.subsystem_nqn = "nqn.2016-06.a:b".into()
    });
    assert_eq!(unknown, (invalid, 256 | 1 << 16));
    let fixed = refusal(&mut lab, |connect| connect.controller_id = 5);
    assert_eq!(fixed, (invalid, 16 | 1 << 16));
    let deep = refusal(&mut lab, |connect| connect.entries = 129);
    assert_eq!(deep, (invalid, 44));
    let orphan = refusal(&mut lab, |connect| {
        connect.queue_id = 1;
        connect.controller_id = 99;
    });
    assert_eq!(orphan, (invalid, 16 | 1 << 16));
    let far = refusal(&mut lab, |connect| connect.queue_id = 1024);
    assert_eq!(far, (invalid, 42));
    lab.target
        .lock()
        .unwrap()
        .allow_any_host(NQN, false)
        .unwrap();
    let stranger = refusal(&mut lab, |_| {});
    assert_eq!(stranger.0, NvmeStatus::CONNECT_INVALID_HOST);
    lab.target.lock().unwrap().add_host(NQN, HOST).unwrap();
    lab.controller(parameters());
}

#[test]
fn a_queue_id_is_given_once_and_again_after_its_queue_has_gone() {
    let mut lab = Lab::new(TargetOptions::default());
    let mut host = lab.connect(false, false);
    let again = host.controller.io_queue_parameters(1);
    let (_, queue) = lab.queue(again.clone());
    assert!(matches!(
        queue.error(),
        Some(InitiatorError::Refused { result: 42, .. })
    ));
    host.queue.fail_all(&mut Vec::new());
    lab.turn();
    assert!(lab.queue(again).1.is_ready());
}

fn poll(lab: &mut Lab, now_ms: u64) {
    lab.now_ms = now_ms;
    lab.core.poll_timeouts(now_ms);
    lab.turn();
    lab.core.poll_timeouts(now_ms);
}

fn open_connections(lab: &Lab) -> usize {
    lab.core
        .connections()
        .filter(|(_, connection)| !connection.is_closed())
        .count()
}

#[test]
fn a_host_that_stops_its_keep_alive_loses_all_its_connections() {
    let mut lab = Lab::new(TargetOptions::default());
    let mut host = lab.connect(false, false);
    let mut events = Vec::new();
    for now_ms in (0..60_000).step_by(1000) {
        host.controller.on_time(now_ms, &mut events);
        poll(&mut lab, now_ms);
        host.controller.on_readable(&mut events);
    }
    assert_eq!(events, []);
    assert_eq!(open_connections(&lab), 2);
    poll(&mut lab, 64_000);
    assert_eq!(open_connections(&lab), 2);
    poll(&mut lab, 75_000);
    assert_eq!(open_connections(&lab), 0);
    assert!(
        lab.target.lock().unwrap().subsystems()[0]
            .controllers
            .is_empty()
    );
    host.controller.on_readable(&mut events);
    assert!(matches!(
        events[..],
        [ControllerEvent::Failed(InitiatorError::Closed(_))]
    ));
}

#[test]
fn an_initiator_gives_up_on_a_target_that_does_not_answer_keep_alive() {
    let mut lab = Lab::new(TargetOptions::default());
    let mut controller = lab.controller(parameters());
    let mut events = Vec::new();
    for now_ms in (0..20_000).step_by(1000) {
        controller.on_time(now_ms, &mut events);
    }
    assert!(matches!(
        events[..],
        [ControllerEvent::Failed(InitiatorError::Timeout { .. })]
    ));
}

#[test]
fn a_connection_that_never_becomes_a_queue_is_closed() {
    let mut lab = Lab::new(TargetOptions::default());
    let (index, _silent) = lab.accept();
    poll(&mut lab, 0);
    poll(&mut lab, 9_999);
    assert!(!lab.core.is_closed(index));
    poll(&mut lab, 10_000);
    assert!(lab.core.is_closed(index));
}

#[test]
fn a_change_of_namespaces_is_told_and_seen() {
    let mut lab = Lab::new(TargetOptions::default());
    let mut host = lab.connect(false, false);
    let follow = |lab: &mut Lab, host: &mut Host| {
        let mut events = Vec::new();
        for _ in 0..20 {
            lab.core.poll_timeouts(0);
            lab.turn();
            host.controller.on_readable(&mut events);
        }
        assert_eq!(events, [ControllerEvent::NamespacesChanged]);
        host.controller.info().namespaces.clone()
    };
    lab.target.lock().unwrap().remove_namespace(NQN, 1).unwrap();
    let namespaces = follow(&mut lab, &mut host);
    assert_eq!(
        namespaces
            .iter()
            .map(|namespace| namespace.nsid)
            .collect::<Vec<_>>(),
        [2]
    );
    assert_eq!(
        host.read(&mut lab, 0, 512),
        Err(NvmeStatus::INVALID_NAMESPACE)
    );
    lab.target
        .lock()
        .unwrap()
        .add_namespace(NQN, disk_namespace())
        .unwrap();
    assert_eq!(follow(&mut lab, &mut host).len(), 2);
    assert!(host.read(&mut lab, 0, 512).is_ok());
    lab.target
        .lock()
        .unwrap()
        .resize_namespace(NQN, 1, 100)
        .unwrap();
    assert_eq!(follow(&mut lab, &mut host)[0].size_blocks, 100);
    assert_eq!(
        host.read(&mut lab, 100, 512),
        Err(NvmeStatus::LBA_OUT_OF_RANGE)
    );
}

#[test]
fn what_the_owner_takes_away_closes_the_connections_that_used_it() {
    let take_away: [fn(&mut TargetState); 3] = [
        |state| state.delete_subsystem(NQN).unwrap(),
        |state| assert!(!state.remove_listener(NQN, &here()).unwrap()),
        |state| state.allow_any_host(NQN, false).unwrap(),
    ];
    for change in take_away {
        let mut lab = Lab::new(TargetOptions::default());
        let mut host = lab.connect(false, false);
        assert_eq!(open_connections(&lab), 2);
        change(&mut lab.target.lock().unwrap());
        lab.core.poll_timeouts(0);
        assert_eq!(open_connections(&lab), 0);
        assert!(host.turn(&mut lab).is_empty());
        assert!(host.queue.error().is_some());
    }
}

/// An admin queue without the controller's sequence on top: after Connect and enable.
fn admin_queue(lab: &mut Lab) -> Host {
    let controller = lab.controller(parameters());
    let parameters = QueueParameters {
        queue_id: 0,
        entries: 32,
        controller_id: CONTROLLER_ID_DYNAMIC,
        in_capsule_bytes: 8192,
        ..controller.io_queue_parameters(0)
    };
    let (connection, queue) = lab.queue(parameters);
    let memory = AlignedBuf::new(1 << 20).unwrap();
    let mut host = Host {
        controller,
        queue,
        connection,
        memory,
    };
    let before = Sqe {
        opcode: admin_opcode::KEEP_ALIVE,
        ..Sqe::default()
    };
    let status = host.run(lab, before, DataPointer::NONE).status;
    assert_eq!(
        status,
        NvmeStatus::COMMAND_SEQUENCE_ERROR,
        "not enabled yet"
    );
    let enable = Sqe::fabrics(0, [0, 0x14, 6 << 16 | 4 << 20 | 1, 0, 0, 0]);
    assert!(host.run(lab, enable, DataPointer::NONE).status.is_success());
    host
}

#[test]
fn an_abort_ends_a_waiting_event_request_and_says_what_it_did() {
    let mut lab = Lab::new(TargetOptions::default());
    let mut host = admin_queue(&mut lab);
    let event = Sqe {
        opcode: admin_opcode::ASYNC_EVENT_REQUEST,
        ..Sqe::default()
    };
    for token in 0..4 {
        host.queue.submit(event, DataPointer::NONE, token).unwrap();
    }
    assert!(host.turn(&mut lab).is_empty());
    let fifth = host.run(&mut lab, event, DataPointer::NONE).status;
    assert_eq!(fifth, NvmeStatus::ASYNC_EVENT_LIMIT);
    // Command ids are slots, handed out from 0 on.
    let abort = |id: u32| Sqe {
        opcode: admin_opcode::ABORT,
        cdw10_15: [id << 16, 0, 0, 0, 0, 0],
        ..Sqe::default()
    };
    host.queue.submit(abort(0), DataPointer::NONE, 50).unwrap();
    let done = host.turn(&mut lab);
    assert_eq!(done.len(), 2);
    assert_eq!(
        (done[0].token, done[0].status),
        (0, NvmeStatus::ABORT_REQUESTED)
    );
    assert_eq!((done[1].token, done[1].dword0()), (50, 0));
    let missed = host.run(&mut lab, abort(25), DataPointer::NONE);
    assert_eq!((missed.status, missed.dword0()), (NvmeStatus::SUCCESS, 1));
}

#[test]
fn admin_commands_answer_or_say_what_they_cannot() {
    let mut lab = Lab::new(TargetOptions::default());
    let mut host = admin_queue(&mut lab);
    let identify = |kind: u8, nsid: u32| Sqe {
        opcode: admin_opcode::IDENTIFY,
        nsid,
        cdw10_15: [u32::from(kind), 0, 0, 0, 0, 0],
        ..Sqe::default()
    };
    let log = |page: u8| Sqe {
        opcode: admin_opcode::GET_LOG_PAGE,
        nsid: u32::MAX,
        cdw10_15: [u32::from(page) | 1023 << 16, 0, 0, 0, 0, 0],
        ..Sqe::default()
    };
    let get = |id: u8, second: u32| Sqe {
        opcode: admin_opcode::GET_FEATURES,
        cdw10_15: [u32::from(id), second, 0, 0, 0, 0],
        ..Sqe::default()
    };
    let set = |id: u8, value: u32| Sqe {
        opcode: admin_opcode::SET_FEATURES,
        ..get(id, value)
    };
    let ok = NvmeStatus::SUCCESS;
    let cases = [
        (identify(cns::CONTROLLER, 0), 4096, ok, 0),
        (identify(cns::NAMESPACE, 1), 4096, ok, 0),
        (identify(cns::NAMESPACE, 9), 4096, ok, 0),
        (
            identify(cns::NAMESPACE, 33),
            4096,
            NvmeStatus::INVALID_NAMESPACE,
            0,
        ),
        (
            identify(cns::NAMESPACE, u32::MAX),
            4096,
            NvmeStatus::INVALID_NAMESPACE,
            0,
        ),
        (
            identify(cns::NAMESPACE_DESCRIPTORS, 9),
            4096,
            NvmeStatus::INVALID_NAMESPACE,
            0,
        ),
        (identify(cns::COMMAND_SET_CONTROLLER, 0), 4096, ok, 0),
        (identify(cns::COMMAND_SET_NAMESPACE, 1), 4096, ok, 0),
        (identify(0x1c, 0), 4096, NvmeStatus::INVALID_FIELD, 0),
        (log(log_page::ERROR), 4096, ok, 0),
        (log(log_page::HEALTH), 4096, ok, 0),
        (log(log_page::FIRMWARE_SLOT), 4096, ok, 0),
        (log(log_page::CHANGED_NAMESPACES), 4096, ok, 0),
        (log(log_page::COMMAND_EFFECTS), 4096, ok, 0),
        (log(log_page::ANA), 4096, NvmeStatus::INVALID_LOG_PAGE, 0),
        (
            log(log_page::DISCOVERY),
            4096,
            NvmeStatus::INVALID_LOG_PAGE,
            0,
        ),
        (
            log(log_page::HEALTH),
            512,
            NvmeStatus::DATA_SGL_LENGTH_INVALID,
            0,
        ),
        (
            set(feature::NUMBER_OF_QUEUES, 3 << 16 | 7),
            0,
            ok,
            3 << 16 | 7,
        ),
        (
            set(feature::NUMBER_OF_QUEUES, 0xfffe_fffe),
            0,
            ok,
            126 << 16 | 126,
        ),
        (
            set(feature::NUMBER_OF_QUEUES, 0xffff),
            0,
            NvmeStatus::INVALID_FIELD,
            0,
        ),
        (set(feature::KEEP_ALIVE_TIMER, 1500), 0, ok, 0),
        (get(feature::KEEP_ALIVE_TIMER, 0), 0, ok, 2000),
        (get(feature::VOLATILE_WRITE_CACHE, 0), 0, ok, 1),
        (set(feature::VOLATILE_WRITE_CACHE, 0), 0, ok, 0),
        (get(feature::VOLATILE_WRITE_CACHE, 0), 0, ok, 0),
        (get(feature::HOST_IDENTIFIER, 1), 16, ok, 0),
        (
            get(feature::HOST_IDENTIFIER, 0),
            16,
            NvmeStatus::INVALID_FIELD,
            0,
        ),
        (
            set(feature::HOST_IDENTIFIER, 1),
            0,
            NvmeStatus::COMMAND_SEQUENCE_ERROR,
            0,
        ),
        (set(feature::ARBITRATION, 5), 0, ok, 0),
        (get(feature::ARBITRATION, 0), 0, ok, 5),
        (get(0x77, 0), 0, NvmeStatus::INVALID_FIELD, 0),
        (
            Sqe {
                opcode: 0x80,
                ..Sqe::default()
            },
            0,
            NvmeStatus::INVALID_OPCODE,
            0,
        ),
        (
            Sqe {
                opcode: 0x10,
                ..Sqe::default()
            },
            0,
            NvmeStatus::INVALID_OPCODE,
            0,
        ),
    ];
    for (sqe, length, status, dword0) in cases {
        let completion = host.run(&mut lab, sqe, host.data(0, length));
        assert_eq!(
            (completion.status, completion.dword0()),
            (status, dword0),
            "{sqe:?}"
        );
        if sqe == get(feature::HOST_IDENTIFIER, 1) {
            assert_eq!(host.memory.as_slice()[..16], [9; 16]);
        }
    }
}

#[test]
fn with_the_write_cache_switched_off_every_write_is_durable() {
    let mut lab = Lab::new(TargetOptions::default());
    let mut admin = admin_queue(&mut lab);
    let (_, queue) = lab.queue(QueueParameters {
        controller_id: admin.queue.controller_id(),
        ..admin.controller.io_queue_parameters(1)
    });
    let off = Sqe {
        opcode: admin_opcode::SET_FEATURES,
        cdw10_15: [u32::from(feature::VOLATILE_WRITE_CACHE), 0, 0, 0, 0, 0],
        ..Sqe::default()
    };
    assert!(
        admin
            .run(&mut lab, off, DataPointer::NONE)
            .status
            .is_success()
    );
    let mut host = Host { queue, ..admin };
    assert!(host.write(&mut lab, 0, &pattern(512, 0)).is_success());
    assert_eq!(lab.disk.fua_writes, 1);
}

#[test]
fn a_controller_reset_ends_its_io_queues_and_lets_them_come_back() {
    let mut lab = Lab::new(TargetOptions::default());
    let mut admin = admin_queue(&mut lab);
    let connect = QueueParameters {
        controller_id: admin.queue.controller_id(),
        ..admin.controller.io_queue_parameters(1)
    };
    let (index, queue) = lab.queue(connect.clone());
    assert!(queue.is_ready());
    let configure = |value: u32| Sqe::fabrics(0, [0, 0x14, value, 0, 0, 0]);
    assert!(
        admin
            .run(&mut lab, configure(0), DataPointer::NONE)
            .status
            .is_success()
    );
    lab.turn();
    assert!(lab.core.is_closed(index));
    let (_, early) = lab.queue(connect.clone());
    assert!(matches!(
        early.error(),
        Some(InitiatorError::Refused {
            status: NvmeStatus::COMMAND_SEQUENCE_ERROR,
            ..
        })
    ));
    assert!(
        admin
            .run(&mut lab, configure(1), DataPointer::NONE)
            .status
            .is_success()
    );
    assert!(lab.queue(connect).1.is_ready());
}

#[test]
fn an_inaccessible_namespace_is_reported_by_ana_and_refuses_io() {
    let mut lab = Lab::new(TargetOptions::default());
    let mut state = lab.target.lock().unwrap();
    state.delete_subsystem(NQN).unwrap();
    let mut parameters = SubsystemParameters::new(NQN);
    (parameters.allow_any_host, parameters.ana_reporting) = (true, true);
    state.create_subsystem(parameters).unwrap();
    state.add_listener(NQN, here()).unwrap();
    state.add_namespace(NQN, disk_namespace()).unwrap();
    drop(state);
    let mut admin = admin_queue(&mut lab);
    let identify = Sqe {
        opcode: admin_opcode::IDENTIFY,
        cdw10_15: [1, 0, 0, 0, 0, 0],
        ..Sqe::default()
    };
    let place = admin.data(0, IDENTIFY_BYTES);
    assert!(admin.run(&mut lab, identify, place).status.is_success());
    let controller = IdentifyController::parse(admin.memory.as_slice().first_chunk().unwrap());
    assert_eq!(
        (controller.ana_groups, controller.namespaces_allowed),
        (32, 32),
        "a host makes room for the log by both"
    );
    let event = Sqe {
        opcode: admin_opcode::ASYNC_EVENT_REQUEST,
        ..Sqe::default()
    };
    admin.queue.submit(event, DataPointer::NONE, 1).unwrap();
    assert!(admin.turn(&mut lab).is_empty());
    let state = AnaState::Inaccessible;
    lab.target
        .lock()
        .unwrap()
        .set_ana_state(NQN, 1, state)
        .unwrap();
    lab.core.poll_timeouts(0);
    let told = admin.turn(&mut lab);
    assert_eq!(told[0].dword0(), 0x0c_0302);
    let log = Sqe {
        opcode: admin_opcode::GET_LOG_PAGE,
        cdw10_15: [u32::from(log_page::ANA) | 12 << 16, 0, 0, 0, 0, 0],
        ..Sqe::default()
    };
    assert!(
        admin
            .run(&mut lab, log, admin.data(0, 52))
            .status
            .is_success()
    );
    let page = admin.memory.as_slice();
    assert_eq!(
        (page[0], page[8], page[16], page[20], page[32], page[48]),
        (1, 1, 1, 1, 3, 1)
    );
    let (_, queue) = lab.queue(QueueParameters {
        controller_id: admin.queue.controller_id(),
        ..admin.controller.io_queue_parameters(1)
    });
    let mut host = Host { queue, ..admin };
    assert_eq!(
        host.read(&mut lab, 0, 512),
        Err(NvmeStatus::ANA_INACCESSIBLE)
    );
}
